"""log Z estimated, bounded, certified, and put into models."""
