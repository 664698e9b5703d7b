"""Show what a conversion cost and saved as one HTML page with pictures."""
