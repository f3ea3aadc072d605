"""Loading plugins, keeping a broken one apart, and tracing what they are asked."""
