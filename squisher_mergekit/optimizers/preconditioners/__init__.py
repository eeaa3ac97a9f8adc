"""Preconditioners of Shampoo and SOAP: recognition in an optimizer's state, and the factors of a Fisher."""
