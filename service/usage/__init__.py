"""Who used what: the ledger of requests, what they cost, keys and their limits."""
