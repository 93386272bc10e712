"""Models of any config of the three toolboxes on images and videos, and what they find in files."""
