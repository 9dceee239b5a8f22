"""Trains the nano checkpoint on public-domain text, with the losses that keep its experts in balance."""
