"""Is the credit right? Arms of settings over the same responses, and their audit."""
