"""The wire's types: what the routes take and answer, as the OpenAPI document describes them.

Times are RFC 3339 texts; names ending in _s and _ms say their unit. An answer may carry more than is named here.
"""
