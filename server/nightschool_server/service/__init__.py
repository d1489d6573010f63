"""The gRPC services: the wire's messages in and out, who may call, and what every call does."""
