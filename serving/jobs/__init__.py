"""Commands that need no server: batch answers, live checks, the skew check, hosts."""
