"""What is known of ops, family by family: in which arguments they are linear, as which product, of whose samples."""
