"""The demo of the zoo: small models of several families, converted here and on a cluster, to the same bytes."""
