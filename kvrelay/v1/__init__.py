"""Generated stubs of protos/kvrelay/v1; see protos/generate.sh."""
