"""Adaptation on the fly: a support set comes in over HTTP, an adapted model's id and predictions go out."""
