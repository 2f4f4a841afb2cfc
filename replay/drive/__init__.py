"""Traffic again: recorded arrivals, prompts and lengths against an endpoint, at their pace, with a report beside the record."""
