"""The serverless platforms' contracts: one table, and the shapes of their bodies."""
