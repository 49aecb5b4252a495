"""What a person looks at: progress while a run goes, tables when it is done."""
