"""The zoo: many models converted in one go, on this machine or a cluster, and nothing lost. Imports no torch."""
