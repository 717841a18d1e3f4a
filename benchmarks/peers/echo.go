// The usual Go echo: one goroutine for each connection.  Usage: echo PORT [KEY CERTIFICATE]
package main

import (
	"crypto/tls"
	"log"
	"net"
	"os"
)

func serve(c net.Conn) {
	defer c.Close()
	if _, err := c.Write([]byte("Hello from the server!")); err != nil {
		return
	}
	// Not io.Copy: on two plain TCP sockets it uses splice(2), which a program that processes its bytes cannot use.
	buffer := make([]byte, 65536)
	for {
		n, err := c.Read(buffer)
		if n > 0 {
			if _, err := c.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	if len(os.Args) == 4 {
		certificate, err := tls.LoadX509KeyPair(os.Args[3], os.Args[2])
		if err != nil {
			log.Fatal(err)
		}
		listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{certificate}})
	}
	for {
		c, err := listener.Accept()
		if err != nil {
			log.Print(err)
			continue
		}
		go serve(c)
	}
}
