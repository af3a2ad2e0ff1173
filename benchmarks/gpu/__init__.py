"""What a machine with a GPU is measured by: correctness first, then figures, within one budget."""
