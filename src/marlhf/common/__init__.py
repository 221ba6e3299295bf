"""What every room uses: errors, records, tokenization, registries."""
