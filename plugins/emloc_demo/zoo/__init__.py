"""The demo of the zoo: small models of all families, converted here and on a cluster, to the same bytes."""
