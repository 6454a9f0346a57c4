"""The dashboard's pages: one file per page, found by Dash; files that start with an underscore are shared parts."""
