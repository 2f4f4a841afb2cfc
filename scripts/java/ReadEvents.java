import java.io.ByteArrayOutputStream;
import java.io.DataInputStream;
import java.io.IOException;
import java.io.PrintStream;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.HexFormat;

import org.apache.avro.Schema;
import org.apache.avro.generic.GenericData;
import org.apache.avro.generic.GenericDatumWriter;
import org.apache.avro.generic.GenericRecord;
import org.apache.avro.io.EncoderFactory;
import org.apache.avro.io.JsonEncoder;
import org.apache.avro.message.BinaryMessageDecoder;
import org.apache.avro.message.BinaryMessageEncoder;

/**
 * Reads tokentape's events with nothing but Java Avro: {@code ReadEvents SCHEMA...} takes events on standard input, each
 * after its length as four bytes, and prints one line for each: the bytes that Java makes of what it read, in hex, a tab,
 * and the event in Avro's JSON. The first schema is what a reader of today wants, the others are those of older writers.
 */
public final class ReadEvents {
    private ReadEvents() {}

    public static void main(String[] arguments) throws IOException {
        Schema today = new Schema.Parser().parse(Path.of(arguments[0]).toFile());
        BinaryMessageDecoder<GenericRecord> decoder = new BinaryMessageDecoder<>(GenericData.get(), today);
        for (int i = 1; i < arguments.length; i++) {
            decoder.addSchema(new Schema.Parser().parse(Path.of(arguments[i]).toFile()));
        }
        PrintStream out = new PrintStream(System.out, false, StandardCharsets.UTF_8);
        DataInputStream in = new DataInputStream(System.in);
        BinaryMessageEncoder<GenericRecord> encoder = new BinaryMessageEncoder<>(GenericData.get(), today);
        while (in.available() > 0) {
            GenericRecord event = decoder.decode(in.readNBytes(in.readInt()));
            out.print(hex(encoder.encode(event)));
            out.print('\t');
            out.print(json(event) + '\n');
        }
        out.flush();
    }

    private static String hex(ByteBuffer bytes) {
        byte[] copy = new byte[bytes.remaining()];
        bytes.get(copy);
        return HexFormat.of().formatHex(copy);
    }

    private static String json(GenericRecord event) throws IOException {
        ByteArrayOutputStream text = new ByteArrayOutputStream();
        JsonEncoder encoder = EncoderFactory.get().jsonEncoder(event.getSchema(), text);
        new GenericDatumWriter<GenericRecord>(event.getSchema()).write(event, encoder);
        encoder.flush();
        return text.toString(StandardCharsets.UTF_8);
    }
}
