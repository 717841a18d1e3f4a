"""The exchanges that ship with rtservice: ordinary Twisted protocols and factories."""
