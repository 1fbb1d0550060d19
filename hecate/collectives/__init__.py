"""The two sparse collectives, from pure functions to bytes on a wire.

`moves` says which expert goes from where to where, `route` how its pieces travel; both are pure. A `Transport` carries
them: `plain` sends every row directly, `routed` follows routes, and `groups` chooses between the two.
"""
