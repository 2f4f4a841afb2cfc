"""Where events live and how they are asked for: log, hot shards, cold segments, ledger, SQL."""
