"""A replica behind NVIDIA Dynamo: a worker of its front end and KV-aware router.

The gateway registers with Dynamo's discovery and takes requests from its request plane as it takes
them from HTTP: they stand in the same line, start a model that rests, and end as others do. Only
this package imports `dynamo`.
"""
