"""A whole EMCA layer with one head: projection of the queries, prototypes, element-wise attention, residual."""
