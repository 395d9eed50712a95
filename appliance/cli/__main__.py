"""`python -m appliance.cli` is `spinebox`."""

from appliance.cli import main

main(prog_name="spinebox")
