"""What ``mmlavit`` commands do that are no scripts: hand over to toolboxes, infer, show configs."""
