"""Commands that train nothing themselves: merge, segment, sweep, quickstart."""
