"""What the appliance is raced against: other servers around the very same work, each in an environment of its own.

`work` is the work, `served` starts and watches a server, `environments` makes what a peer needs, and a `*_server` file is one peer,
run by the Python of its environment. Nothing here is imported by the appliance, and importing this package imports no peer.
"""
