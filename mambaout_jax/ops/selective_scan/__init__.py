"""The selective scan: one public function, one file a backend."""
