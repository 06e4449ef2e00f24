"""The command line: `kvq`."""
