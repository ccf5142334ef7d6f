raise ImportError("no such dependency")
