"""What knows files only: paths, one atomic writer, hashes, processes that share a disk, and the hub."""
