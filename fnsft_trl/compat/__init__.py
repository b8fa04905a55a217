"""What this package needs of other libraries beyond their public interfaces: one module for each library.

Beside each name stand the version that it was seen in, why it is needed, and where it is defined. The tests under
`tests/compat/` hold each of them: when an upgrade takes one away, the test of that name fails.
"""
