"""Pictures and measures of attention."""
