"""Models made to look alike and be different: what is declared by looking must be right, or refused."""
