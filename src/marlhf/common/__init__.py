"""Parts that every room uses: errors, records, tokenization, registries."""
