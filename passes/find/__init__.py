"""Where a graph may hold experts: proposals from the flow of data."""
