"""Every figure of the README beside its rival or its physical limit, both measured in one run."""
