"""The two sparse collectives, from pure functions to bytes on a wire.

`moves` says which expert goes from where to where, `route` how its pieces travel; both are pure. A `Transport` carries
them: `routed` follows routes, from the host or on a stream, and `groups` chooses by the backend.
"""
