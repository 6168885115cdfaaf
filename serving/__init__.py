"""Bundle in, ranked answers out: the gRPC service, its stages and its stores."""
