"""The registered operations and their backends; `segadv.functional` is the public face."""
