"""Results as pictures: one HTML page, a waterfall in a terminal, a trace for Perfetto."""
