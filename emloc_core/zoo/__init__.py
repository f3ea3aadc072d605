"""The zoo: converts many models, on this machine or a cluster, and resumes after any failure. Imports no torch."""
