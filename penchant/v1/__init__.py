"""Generated stubs of the contract in `protos/penchant/v1`; made by `make protos`, never edited."""
