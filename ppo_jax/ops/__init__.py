"""Mathematics on plain arrays and numbers: nothing here knows a config or an environment."""
