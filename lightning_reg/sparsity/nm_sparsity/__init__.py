"""N:M sparsity: of every M consecutive weights N are left; the constraint comes in gradually."""
