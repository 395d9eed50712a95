"""Model families: one file each (SPEC, network, decode), their training, the phantom."""
