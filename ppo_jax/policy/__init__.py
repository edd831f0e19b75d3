"""What acts: action distributions, networks, and the policy as a value."""
