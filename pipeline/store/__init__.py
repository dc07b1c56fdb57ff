"""Published work in an object store that several machines share (docs/STORAGE.md)."""
