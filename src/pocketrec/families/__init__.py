"""What methods of one family share: tables, searches, ladders."""
